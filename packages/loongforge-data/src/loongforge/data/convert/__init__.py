"""Rows with images and videos to webdataset shards: `loongforge data convert-to-webdataset`."""
