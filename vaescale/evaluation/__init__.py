"""Evaluates any Codec, trained here or elsewhere; it needs only encode and decode."""
