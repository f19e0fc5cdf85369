"""An encoder of sounds and a composition that hears, registered with LoongForge."""
