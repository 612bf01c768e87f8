"""Questions that take several trainings or many passes to answer."""
