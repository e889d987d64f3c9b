"""The front half's passes, each an xDSL ModulePass that runs alone on text."""
