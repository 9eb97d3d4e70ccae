"""Saves: one file each, with what is new since the save before, and the small state."""

from buffers.saving.packed_file import DamagedSaveError
from buffers.saving.pieces import Pieces, cut_into_pieces
from buffers.saving.places import NOWHERE, Places, numbers_of, places_of, runs_of
from buffers.saving.regions import BYTE, REGIONS, Regions
from buffers.saving.save_directory import SaveDirectory
from buffers.saving.saved import Save, SavedPiece, folder_name, is_save_directory, list_saves, open_save
from buffers.saving.snapshot import Snapshot

__all__ = [
    "BYTE",
    "DamagedSaveError",
    "NOWHERE",
    "Pieces",
    "Places",
    "REGIONS",
    "Regions",
    "Save",
    "SaveDirectory",
    "SavedPiece",
    "Snapshot",
    "cut_into_pieces",
    "folder_name",
    "is_save_directory",
    "list_saves",
    "numbers_of",
    "open_save",
    "places_of",
    "runs_of",
]
