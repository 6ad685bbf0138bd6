"""An OpenAI-compatible HTTP server: mlx-lm's, with the delta and with limits.

``handler`` is the door (HTTP, keys, origins), ``bodies`` reads what a request asks for, ``engine``
works on many of them at once, ``store`` keeps their caches, ``command`` starts and ends it all.
"""
