"""Architectures, one file each, behind one contract: :class:`~recsys_ssm.models.backbones.base.Backbone`."""
