"""What `buffers.visualization` draws. Nothing here imports matplotlib: all of it draws on what it is given."""
