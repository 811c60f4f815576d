// What effkernels/ops/_tiles.py asks of the launchers, and is told of their launches.
#include <atomic>
#include <map>
#include <mutex>

#include "common/tile_choice.h"

#define EFFK_EXPORT extern "C" __attribute__((visibility("default")))

namespace effk {
namespace {

std::mutex mutex;  // guards what follows
std::map<std::string, TileShape> asked_for;  // by problem, or of all problems of an op by its name
bool recording = false;
std::string recorded, told;

// Read without the mutex: launches should not pay for what is hardly ever used.
std::atomic<bool> in_use{false};

std::string json(const TileShape& shape) {
  std::string text;
  for (int number : shape) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return "[" + text + "]";
}

}  // namespace

bool tile_choice_in_use() { return in_use.load(std::memory_order_acquire); }

std::optional<TileShape> tile_asked_for(const std::string& problem) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const std::string& name : {problem.substr(0, problem.find(' ')), problem}) {
    const auto found = asked_for.find(name);
    if (found != asked_for.end()) return found->second;
  }
  return std::nullopt;
}

bool recording_launches() {
  const std::lock_guard<std::mutex> lock(mutex);
  return recording;
}

void record_launch(const std::string& problem, const TileShape& taken, const std::vector<TileShape>& cheapest_first) {
  std::string all;
  for (const TileShape& shape : cheapest_first) all += (all.empty() ? "" : ", ") + json(shape);
  const std::lock_guard<std::mutex> lock(mutex);
  recorded += (recorded.empty() ? "[\"" : ", [\"") + problem + "\", " + json(taken) + ", [" + all + "]]";
}

// The tile of a problem, or of all problems of an op; no numbers: the heuristic chooses again.
EFFK_EXPORT void effkernels_ask_for_tile(const char* name, const int* numbers, int count) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (count > 0)
    asked_for[name] = TileShape(numbers, numbers + count);
  else
    asked_for.erase(name);
  in_use.store(recording || !asked_for.empty(), std::memory_order_release);
}

// Begins or ends to record. Returns what was recorded, a JSON list of [problem, tile, all tiles, the cheapest first]: it
// lasts until the next call, as one thread at a time records.
EFFK_EXPORT const char* effkernels_record_launches(bool record) {
  const std::lock_guard<std::mutex> lock(mutex);
  told = "[" + recorded + "]";
  recorded.clear();
  recording = record;
  in_use.store(recording || !asked_for.empty(), std::memory_order_release);
  return told.c_str();
}

}  // namespace effk
