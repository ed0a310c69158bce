// Work of several kinds that torch's threads take, task by task, in one parallel region.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "common/operand.h"

namespace torch_sage {

class Tasks {
 public:
  // Rows of one head: `index` counts the tasks of this operand.
  struct Rows {
    int64_t batch, head, index, first, count;
  };

  // Cuts every head of x into tasks of `task_rows` rows. A body must not throw: torch 2.11 would
  // report that its threads failed, and nothing more. What it refers to must live until run().
  void add(const Operand& x, int64_t task_rows, std::function<void(const Rows&)> body);

  // Tasks are handed out, not divided beforehand: kinds cost unequally, and cores are unequally
  // busy. Which thread takes one changes no result.
  void run() const;

 private:
  struct Kind {
    int64_t heads, rows, task_rows, per_head, first;
    std::function<void(const Rows&)> body;
  };

  void run_one(int64_t index) const;

  std::vector<Kind> kinds_;
  int64_t tasks_ = 0;
  int64_t elements_ = 0;
};

}  // namespace torch_sage
