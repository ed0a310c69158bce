"""Attention that takes Q and K before their norms and rotary embeddings (``rotary_sdpa``)."""
