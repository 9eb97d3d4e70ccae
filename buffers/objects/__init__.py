"""Objects in a store, by fsspec: read by ranges, many at once, with deadlines, and a cache of our own."""

from buffers.objects.cache import DEFAULT_CACHE_BYTES, ObjectCache
from buffers.objects.index import INDEX, Index, mark_of
from buffers.objects.object_file import ObjectFile, ObjectFiles, Part
from buffers.objects.store import ObjectInfo, ObjectStore, ObjectStoreError, Page, check_local, is_url

__all__ = [
    "DEFAULT_CACHE_BYTES",
    "INDEX",
    "Index",
    "ObjectCache",
    "ObjectFile",
    "ObjectFiles",
    "ObjectInfo",
    "ObjectStore",
    "ObjectStoreError",
    "Page",
    "Part",
    "check_local",
    "is_url",
    "mark_of",
]
