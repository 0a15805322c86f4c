"""Export: a finished network as files for deployment, compared with the original and described."""
