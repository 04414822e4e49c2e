"""Whether a bundle is its checkpoint (parity), and how well a model predicts a text (bits per byte).

The folder is not called `parity`, because `lrt_deploy.parity` is the public function.
"""
