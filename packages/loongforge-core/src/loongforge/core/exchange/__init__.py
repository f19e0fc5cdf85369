"""From the ranks that encode an image to the ranks whose tokens need its features, and the gradients back.

A feature leaves exactly one rank and arrives at exactly one, so that every gradient comes back once: no layout needs a
factor. Where all tensor parallel ranks need a feature (no sequence parallelism), each receives a share and they gather.
"""
