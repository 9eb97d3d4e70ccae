"""What a save keeps of sources, and how it comes back."""

from buffers.dataset.saving.loading import load_source, verify_save
from buffers.dataset.saving.writing import SavedBeside, Unsaved, begin_source

__all__ = ["SavedBeside", "Unsaved", "begin_source", "load_source", "verify_save"]
