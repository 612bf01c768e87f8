"""Settings under which a kind of data is learnt: a file each; `layersync train --preset NAME`."""
