#include <cstring>

#include "harness.h"

namespace {

bool run_test(const std::string& name, const std::function<void()>& test) {
  try {
    test();
    std::printf("passed %s\n", name.c_str());
    return true;
  } catch (const std::exception& error) {
    std::printf("FAILED %s: %s\n", name.c_str(), error.what());
    return false;
  }
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> names;
  for (int i = 1; i < count; i++) {
    if (std::strcmp(arguments[i], "--list") == 0) {
      for (const auto& [name, test] : harness::tests()) std::printf("%s\n", name.c_str());
      return 0;
    }
    names.push_back(arguments[i]);
  }
  int failures = 0;
  if (names.empty()) {
    for (const auto& [name, test] : harness::tests()) failures += !run_test(name, test);
  }
  for (const std::string& name : names) {
    const auto found = harness::tests().find(name);
    failures += found == harness::tests().end() || !run_test(name, found->second);
  }
  return failures > 0;
}
