"""Closed lists of names: what a command line can ask for, known before torch is loaded."""

#: What the name of a data set begins with that is a folder of images, or a CSV file with their paths.
FOLDER, CSV = "folder:", "csv:"
FILES = (FOLDER, CSV)
#: Profiles of a long tail.
PROFILES = ("exp", "step", "pareto", "natural")
#: How anchors are drawn, and which of these samplers read labels.
SAMPLERS = ("uniform", "class-balanced", "square-root", "effective-number", "progressive", "cluster-balanced")
LABEL_SAMPLERS = ("class-balanced", "square-root", "effective-number", "progressive")
#: Another image of the anchor's group (patient, lesion, slide), as in MICLe (Azizi et al., arXiv 2101.05224).
SAME_GROUP = "same-group"
PARTNERS = (*SAMPLERS, SAME_GROUP)
#: What renders views.
BACKENDS = ("kornia", "dali")
