"""The QLoRAFinetune resource and the contract between operator and trainer: pydantic and the standard library only."""
