"""Backbones that compare images with texts: CLIP, SigLIP and models of the same structure."""
