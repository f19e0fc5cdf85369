"""From the host to a device without a wait, for the trainer and for wheels that know nothing below core."""

from loongforge.kernels.sending import sent as sent
