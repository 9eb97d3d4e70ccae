"""Pictures of datasets and batches, drawn with matplotlib: `buffers.viewing.visualizer` under its documented name."""

from buffers.viewing.visualizer import MatplotlibVisualizer, plot_dataset

__all__ = ["MatplotlibVisualizer", "plot_dataset"]
