"""The demo model: a small trained Llama that completes Python, with the script that trained it."""
