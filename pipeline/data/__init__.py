"""Images in: manifests name the files, sources read them, decoding and augmentation make tensors."""
