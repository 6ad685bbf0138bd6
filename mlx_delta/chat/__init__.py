"""Talking to a model: a conversation that keeps its caches, and the command around it.

:class:`Conversation` knows nothing of terminals, so that apps of any kind can be made of it
(``examples/chat_app.py``, ``examples/notes_api.py``); :class:`ModelThread` is the one thread that
it then lives on.
"""

from .conversation import Conversation
from .options import ContextFullError, Options, Turn
from .terminal import stopped_by_interrupt
from .thread import ModelThread, Streaming

__all__ = [
    "ContextFullError",
    "Conversation",
    "ModelThread",
    "Options",
    "Streaming",
    "Turn",
    "stopped_by_interrupt",
]
