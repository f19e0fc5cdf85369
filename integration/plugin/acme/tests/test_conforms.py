from loongforge.core.testing import check_family


def test_acme_llama_conforms(tmp_path):
    print(check_family("acme_llama", directory=tmp_path))
