"""What makes files: graphs, bundles, engines. Imported as `lrt_deploy.exporters`."""
