"""`layersync probe`: what does each block know, and which pair follows from it?"""
