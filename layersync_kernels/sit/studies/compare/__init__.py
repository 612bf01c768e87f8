"""`layersync compare`: which method wins, at equal steps and at equal time?"""
