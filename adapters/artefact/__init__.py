"""The artefact: the folder that holds everything that was trained."""
