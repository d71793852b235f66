"""Measurements on real pretrained models and real data, which lie outside the project (`LORAKIT_SHARED`)."""
