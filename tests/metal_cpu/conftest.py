"""Makes the bench available to its own tests."""

from .fixture import bench

__all__ = ["bench"]
