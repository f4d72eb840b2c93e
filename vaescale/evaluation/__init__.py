"""Encode and decode only: any Codec, trained here or not."""
