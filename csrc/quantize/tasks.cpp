#include "quantize/tasks.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <utility>

namespace torch_sage {

void Tasks::add(const Operand& x, int64_t task_rows, std::function<void(const Rows&)> body) {
  const int64_t per_head = x.rows / task_rows + (x.rows % task_rows != 0);
  kinds_.push_back({x.heads, x.rows, task_rows, per_head, tasks_, std::move(body)});
  tasks_ += x.batch * x.heads * per_head;
  elements_ += x.batch * x.heads * x.rows * x.columns;
}

void Tasks::run() const {
  // Below 32 Ki elements a thread, waking it takes longer than the work.
  const int64_t useful = std::max<int64_t>(1, elements_ / 32768);
  const int64_t threads = std::min({useful, tasks_, int64_t{torch::stable::get_num_threads()}});
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks_; ++i) run_one(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < tasks_;) run_one(i);
  });
}

void Tasks::run_one(int64_t index) const {
  auto kind = kinds_.rbegin();
  while (index < kind->first) ++kind;
  const int64_t task = index - kind->first;
  const int64_t head = task / kind->per_head;
  const int64_t first = task % kind->per_head * kind->task_rows;
  kind->body({head / kind->heads, head % kind->heads, task, first,
              std::min(kind->task_rows, kind->rows - first)});
}

}  // namespace torch_sage
