"""``python -m torch_sage demo``: three real models, compiled with and without torch_sage.

Nothing here is imported by ``torch_sage`` itself; the libraries it needs are the extra ``demo``.
"""
