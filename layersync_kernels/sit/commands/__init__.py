"""The subcommands of `layersync` that concern the trainer."""
