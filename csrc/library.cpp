// Every operator of the extension: the table of contents. Implementations: csrc/ops/, one file per family.
#include <torch/library.h>

TORCH_LIBRARY(moq, m) {
  (void)m;
}
