#include "runtime/tuner/isolated_device.h"

#include <chrono>

#include "generator/errors.h"

namespace flash_attn_jit {
namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

CandidateFault IsolatedDevice::fault_of(const Conversation::Answer& answer) {
  process_.reset();
  if (answer.end == Conversation::End::kTimedOut) return {Outcome::kTimedOut, answer.line};
  return {Outcome::kCrashed, "the process that ran it " + answer.line};
}

// A fault: it was not ready in time.
std::optional<CandidateFault> IsolatedDevice::start(double limit_seconds) {
  process_ = std::make_unique<Conversation>(command_);
  ++times_started_;
  sent_.clear();
  const Conversation::Answer answer = process_->ask(setup_line(setup_), limit_seconds);
  if (answer.end == Conversation::End::kTimedOut) return fault_of(answer);
  if (answer.end == Conversation::End::kEnded) {
    process_.reset();
    throw Error("the process that measures " + answer.line);
  }
  const WorkerReply reply = parse_reply(answer.line);
  if (!reply.error.empty()) {
    process_.reset();
    throw Error(reply.error);
  }
  if (times_started_ == 1) figures_ = reply.figures;
  setup_.measures_memory = false;
  return std::nullopt;
}

template <class MakeLine>
IsolatedDevice::Told IsolatedDevice::ask(const CompiledCandidate& candidate, double limit_seconds,
                                         const MakeLine& make_line) {
  const auto begin = std::chrono::steady_clock::now();
  if (process_ == nullptr)
    if (auto fault = start(limit_seconds)) return {std::move(fault), {}};
  const bool is_new = sent_.insert(candidate.tile).second;
  const Conversation::Answer answer =
      process_->ask(make_line(is_new), std::max(limit_seconds - seconds_since(begin), 0.0));
  if (answer.end != Conversation::End::kNone) return {fault_of(answer), {}};
  Told told{std::nullopt, parse_reply(answer.line)};
  if (told.reply.is_broken) process_.reset();
  if (!told.reply.error.empty()) throw Error(told.reply.error);
  return told;
}

CheckedCandidate IsolatedDevice::check(const CompiledCandidate& candidate, double limit_seconds) {
  Told told = ask(candidate, limit_seconds, [&](bool with_kernel) { return check_line(candidate, with_kernel); });
  if (told.fault) return {std::move(told.fault), std::nullopt, std::nullopt, 0};
  return told.reply.checked;
}

TimedBurst IsolatedDevice::time(const CompiledCandidate& candidate, int launches, double limit_seconds) {
  Told told =
      ask(candidate, limit_seconds, [&](bool with_kernel) { return time_line(candidate, with_kernel, launches); });
  if (told.fault) return {std::move(told.fault), {}};
  return told.reply.burst;
}

}  // namespace flash_attn_jit
