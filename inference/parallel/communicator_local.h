#pragma once

#include <memory>

#include "inference/parallel/communicator.h"
#include "inference/parallel/shared_memory_group.h"

namespace moq::inference {

/// A communicator over shared memory that all ranks have mapped.
std::shared_ptr<Communicator> shared_memory_communicator(std::unique_ptr<SharedMemoryGroup> group);

}  // namespace moq::inference
