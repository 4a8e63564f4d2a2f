"""What is no layer at all, given to `prune`: each ends in one of the package's own errors, that says what it is."""

import warnings

import pytest
import torch

import s3lab as s3

W, H = torch.ones(4, 8), torch.eye(8)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's, that its sparse tensors are in beta
    CSR = W.to_sparse_csr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": W.to(torch.float8_e4m3fn)}, "W is of torch.float8_e4m3fn"),
        ({"W": W.to_sparse()}, r"W is stored as torch.sparse_coo: .* W.to_dense\(\)"),
        ({"W": CSR}, "W is stored as torch.sparse_csr"),
        ({"W": W.tolist()}, r"W is a list: give a tensor, such as torch.as_tensor\(W\)"),
        ({"W": W.numpy()}, "W is a ndarray"),
        ({"W": None}, "W is a NoneType"),
        ({"W": 3}, "W is a int"),
        ({"W": {}, "H": None}, "no weights"),
        ({"W": {"a": W}}, "no name, of which there is no weight"),
        ({"W": {"a": W}, "H": {"a": H}}, "2:4 is for one tensor"),
        ({"W": W.to("meta")}, "W is on the meta device and has no values"),
        ({"W": W + 0j}, "W is of torch.complex64"),
        ({"H": H.to("meta")}, "H is on the meta device"),
        ({"H": H.numpy()}, "H is a ndarray"),
        ({"H": H.to_sparse()}, "H is stored as"),
        ({"H": H.bool()}, "H is of torch.bool"),
        ({"H": {"a": H}}, "a, of which there is no weight"),
        ({"H_test": 3}, "H_test is a int"),
        ({"spec": None}, "a spec is read from text"),
        ({"spec": ["2:4"]}, "a spec is read from text"),
        ({"solver": None}, "no solver is called None"),
        ({"solver": []}, r"no solver is called \[\]"),
        ({"salient": 3}, "no solver is called 3"),
        ({"refine": "yes"}, "refine = 'yes'"),
        ({"damp": "none"}, "damp = none"),
        ({"damp": None}, "damp = None"),
        ({"damp": float("inf")}, "damp = inf"),
    ],
)
def test_what_is_no_layer_is_told(change, message):
    with pytest.raises(s3.S3Error, match=message):
        s3.prune(**{"W": W, "spec": "2:4", "H": H} | change)
