"""Reading a prompt once for many questions: ``mlx_lm.cache_prompt`` with the delta."""
