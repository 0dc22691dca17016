// What a library of operators for ONNX Runtime has to know of its C interface, and no more: the
// package has no header. The table of functions only ever grows at its end, so a function's place
// in it is fixed, and so is the order of fields in CustomOp.

#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t VERSION = 18;  // of the interface; the first in which an operator may work in place

// ONNX Runtime's own; only pointers to them come here.
struct Status;
struct SessionOptions;
struct Domain;
struct KernelInfo;
struct KernelContext;
struct ShapeInference;
struct Value;
struct Shape;

// What a function that fails throws; the status is then the catcher's.
struct Failure {
  Status* status;
};

enum Code : int { FAIL = 1, INVALID_ARGUMENT = 2 };
enum Type : int { FLOAT = 1, INT64 = 7 };
enum Presence : int { REQUIRED = 0, OPTIONAL = 1 };

struct Base {
  const void* const* (*GetApi)(uint32_t version);  // null for a version it does not know
  const char* (*GetVersionString)();
};

struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const void* const*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  Type (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  Type (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  Presence (*GetInputCharacteristic)(const CustomOp*, size_t);
  Presence (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const void* const*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInference*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

// The functions that are used. Those that fail throw a Failure.
class Api {
 public:
  explicit Api(const void* const* table) : table_(table) {}

  Status* error(Code code, const char* message) const { return get<Status*(int, const char*)>(0)(code, message); }

  Domain* domain(const char* name) const {
    Domain* made = nullptr;
    check<const char*, Domain**>(26, name, &made);
    return made;
  }
  void add(Domain* domain, const CustomOp* op) const { check<Domain*, const CustomOp*>(27, domain, op); }
  void add(SessionOptions* options, Domain* domain) const { check<SessionOptions*, Domain*>(28, options, domain); }

  int64_t number(const KernelInfo* info, const char* name) const {
    int64_t found = 0;
    check<const KernelInfo*, const char*, int64_t*>(86, info, name, &found);
    return found;
  }
  // At most size - 1 characters and a zero.
  void text(const KernelInfo* info, const char* name, char* to, size_t size) const {
    check<const KernelInfo*, const char*, char*, size_t*>(87, info, name, to, &size);
  }
  size_t inputs(const KernelInfo* info) const {
    size_t found = 0;
    check<const KernelInfo*, size_t*>(230, info, &found);
    return found;
  }
  // A constant of the graph, which lives as long as the kernel; null for what is computed.
  const Value* constant(const KernelInfo* info, size_t index) const {
    int is_constant = 0;
    const Value* found = nullptr;
    check<const KernelInfo*, size_t, int*, const Value**>(249, info, index, &is_constant, &found);
    return is_constant ? found : nullptr;
  }

  size_t outputs(const KernelContext* context) const {
    size_t found = 0;
    check<const KernelContext*, size_t*>(89, context, &found);
    return found;
  }
  const Value* input(const KernelContext* context, size_t index) const {
    const Value* found = nullptr;
    check<const KernelContext*, size_t, const Value**>(90, context, index, &found);
    return found;
  }
  Value* output(KernelContext* context, size_t index, const int64_t* sizes, size_t dimensions) const {
    Value* made = nullptr;
    check<KernelContext*, size_t, const int64_t*, size_t, Value**>(91, context, index, sizes, dimensions, &made);
    return made;
  }
  template <class T>
  T* data(const Value* value) const {
    void* found = nullptr;
    check<Value*, void**>(51, const_cast<Value*>(value), &found);
    return static_cast<T*>(found);
  }
  // The number of dimensions; the sizes of the first `most`.
  size_t sizes(const Value* value, int64_t* to, size_t most) const {
    Shape* shape = nullptr;
    size_t dimensions = 0;
    check<const Value*, Shape**>(65, value, &shape);
    check<const Shape*, size_t*>(61, shape, &dimensions);
    check<const Shape*, int64_t*, size_t>(62, shape, to, dimensions < most ? dimensions : most);
    get<void(Shape*)>(99)(shape);
    return dimensions;
  }

  // fn(i) for each i below n, by the threads of the session; perhaps one after another.
  template <class F>
  void parallel(const KernelContext* context, size_t n, F& fn) const {
    check<const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*>(
        274, context, [](void* f, size_t i) { (*static_cast<F*>(f))(i); }, n, 0, &fn);
  }

  // An output has the shape of the first input.
  void keep_shape(ShapeInference* context, size_t output) const {
    Shape* shape = nullptr;
    check<const ShapeInference*, size_t, Shape**>(268, context, 0, &shape);
    check<const ShapeInference*, size_t, const Shape*>(270, context, output, shape);
  }

 private:
  template <class F>
  F* get(size_t place) const {
    return reinterpret_cast<F*>(const_cast<void*>(table_[place]));
  }
  template <class... A>
  void check(size_t place, A... a) const {
    if (Status* status = get<Status*(A...)>(place)(a...)) throw Failure{status};
  }

  const void* const* table_;
};

}  // namespace ort
