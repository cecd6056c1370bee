"""From a backbone and two derived models to the patched model."""

# Safety enhancement and over-safety mitigation: the two patches, in the order in which they are
# added to the backbone.
PATCH_ROLES = ("se", "osm")
