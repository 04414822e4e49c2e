"""What runs bundles, without torch. Imported as `lrt_deploy.runtime`."""
