"""Weights on the Hugging Face hub: `hub:OWNER/NAME[@REVISION][/PATH]`, downloaded (`repository`) and published."""
