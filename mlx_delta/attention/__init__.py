"""Hybrid delta attention over a cache, and the choice between kernel and operations.

A key's way, one sentence per room:

* ``models`` rotates it, and hands it to ``delta_attention`` with its value and the queries.
* ``attention`` checks that their shapes fit, and gives key and value to the cache.
* ``cache`` puts the key into the store's near keys; when a block is so far behind that no later
  query's window reaches it, it has the block's keys held (``ops``) and moves them to the far ones;
  and it leaves a ``Step``: far keys, near keys, values, and where each row stands.
* ``attention`` chooses, in ``choice``, and nowhere else: the decode kernel for few queries over
  stored blocks where there is one, else MLX's own attention over keys written out (``operations``).
* ``ops`` launches what was chosen, on arrays alone; its ``backend`` knows which kernels there are.
"""
