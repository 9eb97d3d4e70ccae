"""Episodes on disk: one file each, in a directory that says by names and sizes what it holds."""

from buffers.dataset.files.individual_file import IndividualFileDataset

__all__ = ["IndividualFileDataset"]
