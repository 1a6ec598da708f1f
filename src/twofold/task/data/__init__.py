"""Samples that are made of records: clips, images, pairs and sentences, from files, folders, rows and data sets."""
