"""This process and this machine: files, folders, progress, processes, unfinished work."""
