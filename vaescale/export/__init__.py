"""Writes what a trained run makes of its data as shards: the codes of images, and the images of codes."""
