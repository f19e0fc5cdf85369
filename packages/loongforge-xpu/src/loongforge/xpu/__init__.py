"""Kunlun XPU behind the platform contract of loongforge.core. Importing this does nothing; see spec.py."""
