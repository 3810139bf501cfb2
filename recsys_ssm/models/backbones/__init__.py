"""Backbones, an architecture a file, behind one contract: :class:`~recsys_ssm.models.backbones.base.Backbone`."""
